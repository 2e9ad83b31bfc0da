from .unified_embedding.collisions import expected_collisions as expected_collisions
from .unified_embedding.hashing import fingerprint as fingerprint
from .unified_embedding.hashing import mix64 as mix64
from .unified_embedding.table import UnifiedEmbedding as UnifiedEmbedding
