"""What an embedding is worth: verification, retrieval, geometry."""
