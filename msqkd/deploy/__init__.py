"""What an edge engineer takes to the device: files, converter, calibration data, and the comparison on the device."""
