"""Every Python block of the pages on losses and embeddings runs as it stands."""

from __future__ import annotations

from typing import Any

import pytest
from tests.unit.docs.test_papers_run import blocks


@pytest.mark.parametrize(
    "page", ["elasticface", "unpg", "contrastive-ft", "projection-head", "unified-embedding"]
)
def test_the_blocks_of_a_page_run(page):
    names: dict[str, Any] = {}
    for k, block in enumerate(blocks(page)):
        exec(compile(block, f"{page}.md, block {k}", "exec"), names)
    assert names
