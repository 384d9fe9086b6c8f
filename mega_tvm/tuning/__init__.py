"""Tuning: search the decisions of kernels' schedules, keep what was measured, and use it again.

`space` and `versions` say what a record is of, `log` keeps records in a directory, `lookup` finds
them for a compile; `tasks`, `operands`, `trial`, `workers` and `search` measure and search, and
`session` runs a whole tuning.
"""
