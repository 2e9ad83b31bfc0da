"""One training loop with callbacks, many small networks as one program, processes, and attacks."""
