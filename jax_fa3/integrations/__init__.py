"""jax_fa3 in other projects: one module for each, to be imported by its name.

`import jax_fa3` leaves this package alone, and this package the projects: each module imports its own.
"""
