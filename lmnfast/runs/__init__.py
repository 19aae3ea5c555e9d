"""What every command that leaves a directory needs: whole files, tables, worker processes, a progress bar, a device."""
