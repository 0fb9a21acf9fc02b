"""`python -m omniserve.client` is the `omniserve` command."""

from omniserve.client.cli import main

main()
