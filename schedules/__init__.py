"""Kernels of Mega, one folder an operator.

``<op>/naive.py`` says what is computed, as an unscheduled PrimFunc; ``<op>/cpu.py`` says how, as
decisions (MetaSchedule sampling instructions with measured defaults) and the TensorIR they select.
``registry`` joins the two.
"""
