"""What tests of several rooms share: daemons, vaults, child scripts, documents."""
