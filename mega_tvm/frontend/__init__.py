"""Importers: from a model of another framework to a Relax module of Mega's operators."""
