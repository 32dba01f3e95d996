"""What quantisation did to a network: the layer table, plots and the report."""
