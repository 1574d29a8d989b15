from experiments.explorer.serve import main

main()
