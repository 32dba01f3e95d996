"""What makes post-training quantisation lose less: methods that change weights, biases and scales."""
