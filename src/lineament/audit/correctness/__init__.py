"""How often answers are right, by the kind of task: what the lens *accuracy* measures and says."""
