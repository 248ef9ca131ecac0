from ddo_cli.cli import main

main()
