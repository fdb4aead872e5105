"""Search: a store of a student's vectors, and what asks it. Needs `pip install "fieldmark[search]"`."""
