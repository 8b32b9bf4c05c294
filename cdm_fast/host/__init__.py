"""Files (also untrusted ones and zips), processes, devices and the terminal of the host machine."""
