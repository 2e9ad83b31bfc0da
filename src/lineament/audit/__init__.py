"""The main job: lenses over one model, one report."""
