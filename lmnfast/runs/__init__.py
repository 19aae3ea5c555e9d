"""Code shared by the commands: whole files, tables, worker processes, a progress bar, the device, figures as files."""
