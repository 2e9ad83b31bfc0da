"""One file a lens; :mod:`lineament.audit.catalogue` says what a file states and defines."""
