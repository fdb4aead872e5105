"""Methods: one recipe a file, read top to bottom; they join the other rooms, which do not know them."""
