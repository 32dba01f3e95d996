"""A network as a graph: captured from an `nn.Cell`, rewritten by passes, built into a trainable cell again."""
