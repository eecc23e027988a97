"""The subspace: moments, rank, basis and leverage scores."""
