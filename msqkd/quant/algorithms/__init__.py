"""What makes post-training quantisation lose less: methods that change weights, biases and scales, not the network's work."""
