"""Tools for compiled code: static arguments, tracing, dependence analysis and devices."""
