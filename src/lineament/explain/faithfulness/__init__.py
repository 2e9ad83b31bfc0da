"""Is an explanation true? Deletion and insertion, scores of pixel maps, and DiffROAR, which judges by retraining."""
