"""Units of several networks, aligned: matching, mutual information, sparse maps, clusters, similarities."""
