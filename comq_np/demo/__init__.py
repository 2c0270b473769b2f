"""The demonstration: two small networks with their data, on NumPy alone, and what quantizing costs them."""
