"""What compiled code needs to know: arguments, devices, and which results depend on which."""
