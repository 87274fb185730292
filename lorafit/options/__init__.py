"""What the command line asks of the heavy commands, checked before anything is loaded. No torch."""
