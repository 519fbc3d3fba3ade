"""Measures of what a model says: diversity, drift, calibration, worlds, probes, patches.

Functions of arrays that return numbers, in numpy and float64 but where a model is asked. In nats.
"""
