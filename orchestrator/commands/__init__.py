"""The command `onebasis`: what is typed, and what is printed."""
