"""Ascend NPUs: the file that is quantised already, the float file for the vendor, and the program to simulate."""
