"""A model split in two folders: the client's part without outsourced weights, and the worker's part with them."""
