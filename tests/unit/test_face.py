"""What `import lineament` shows: fast, without torch, two dots to any public name, and nothing that is not public."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import lineament

WINGS = [name for name in dir(lineament) if inspect.ismodule(getattr(lineament, name)) and name != "papers"]
PUBLIC = {
    f"{wing}.{name}": getattr(getattr(lineament, wing), name)
    for wing in WINGS
    for name in dir(getattr(lineament, wing))
}
PUBLIC |= {name: getattr(lineament, name) for name in dir(lineament) if name not in (*WINGS, "papers")}


def test_the_import_is_fast_and_loads_no_torch():
    code = "import time; start = time.perf_counter(); import lineament, sys; print(time.perf_counter() - start, 'torch' in sys.modules)"
    seconds, torch = min(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split()
        for _ in range(3)
    )
    assert float(seconds) < 0.15 and torch == "False"


@pytest.mark.parametrize("wing", WINGS)
def test_a_wing_lists_its_public_names_and_no_others(wing):
    module = getattr(lineament, wing)
    assert dir(module) == sorted(module.__all__) and module.__doc__
    with pytest.raises(AttributeError):
        getattr(module, "nothing" + "_here")


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_a_docstring_with_an_example(name):
    documented = PUBLIC[name]
    if inspect.ismodule(documented):
        pytest.skip("a wing within a wing")
    assert ">>> " in (inspect.getdoc(documented) or ""), f"lineament.{name} has no example"


def test_packages_and_functions_of_one_name_are_both_there():
    from lineament.audit import lenses
    from lineament.explain.saliency import maps
    from lineament.measure.collapse import profile

    assert lineament.explain.saliency is maps.saliency and lineament.measure.collapse is profile.collapse
    assert callable(lineament.audit) and lenses.__name__ == "lineament.audit.lenses"
