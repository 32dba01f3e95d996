"""Settings, the plan, fake quantisation and calibration."""
