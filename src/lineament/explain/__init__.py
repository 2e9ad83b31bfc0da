"""Which inputs and which components decide an output."""
