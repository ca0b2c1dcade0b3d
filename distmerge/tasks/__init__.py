"""Merging task vectors: element by element, or matrix by matrix."""
