"""What the commands share: whole files, tables, worker processes, a progress bar, the device, figures as files."""
