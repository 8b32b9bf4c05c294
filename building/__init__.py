"""How the package is built: the PEP 517 backend and the build_ext command of the optional kernels."""
