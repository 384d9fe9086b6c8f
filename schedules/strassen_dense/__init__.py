"""Dense layer by Strassen's method: an eighth fewer multiplications, and more rounding."""
