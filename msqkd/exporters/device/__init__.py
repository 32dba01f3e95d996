"""From a graph and its plan to the program a device runs."""

from msqkd.exporters.device.lower import FLOAT_FILE, INT8_FILE, WEIGHT_FILE, lite_program

__all__ = ["FLOAT_FILE", "INT8_FILE", "WEIGHT_FILE", "lite_program"]
