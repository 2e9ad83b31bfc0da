"""What recipes share: presets, one run in one folder, images and small networks."""
