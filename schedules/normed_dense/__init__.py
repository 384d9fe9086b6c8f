"""Dense layer on rows that are layer-normalized first; used on GPUs, where it saves a launch."""
