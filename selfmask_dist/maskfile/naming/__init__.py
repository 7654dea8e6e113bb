"""Masks on models of another library than they were trained with."""
