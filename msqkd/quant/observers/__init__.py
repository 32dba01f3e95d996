"""Observers: they watch an activation during calibration and propose the range to quantise. One a file."""

from msqkd.quant.observers.base import OBSERVERS, Observer, make_observer, register
from msqkd.quant.observers.ema import EMAObserver
from msqkd.quant.observers.histogram import HistogramObserver
from msqkd.quant.observers.kl import KLObserver
from msqkd.quant.observers.magnitudes import Magnitudes
from msqkd.quant.observers.minmax import MinMaxObserver
from msqkd.quant.observers.mse import MSEObserver
from msqkd.quant.observers.percentile import PercentileObserver

__all__ = [
    "OBSERVERS",
    "EMAObserver",
    "HistogramObserver",
    "KLObserver",
    "MSEObserver",
    "Magnitudes",
    "MinMaxObserver",
    "Observer",
    "PercentileObserver",
    "make_observer",
    "register",
]
