"""What the machine offers: files, processes, devices, a terminal."""
