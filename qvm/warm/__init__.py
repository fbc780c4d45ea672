"""Warm images: images booted once and frozen, from which new machines begin in a fraction of a second."""
