"""Nothing about diffusion: options, files, pictures, processes, and what every training program does after a step."""
