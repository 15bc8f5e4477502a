{
  description = "Limit the bandwidth of any process, service or cgroup on Linux";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";

  # It is in tools/packaging/nix: nix run 'path:.?dir=tools/packaging/nix'
  outputs =
    { self, nixpkgs }:
    let
      systems = [
        "x86_64-linux"
        "aarch64-linux"
      ];
      each = nixpkgs.lib.genAttrs systems;
      source = ../../..;
      # The version is in one place.
      version = builtins.head (
        builtins.match ".*\n__version__ = \"([^\"]+)\".*" (
          builtins.readFile (source + "/pybpfthrottle/__init__.py")
        )
      );
    in
    {
      packages = each (
        system:
        let
          python = nixpkgs.legacyPackages.${system}.python3Packages;
        in
        {
          default = python.buildPythonApplication {
            pname = "pybpfthrottle";
            inherit version;
            src = source;
            pyproject = true;
            build-system = [
              python.setuptools
              python.click
            ];
            dependencies = [
              python.click
              python.pyelftools
              python.rich
            ];
            # They need root, and a kernel of their own.
            doCheck = false;
            pythonImportsCheck = [ "pybpfthrottle" ];
          };
        }
      );

      nixosModules.default =
        { pkgs, lib, ... }:
        let
          program = self.packages.${pkgs.stdenv.hostPlatform.system}.default;
        in
        {
          environment.systemPackages = [ program ];
          systemd.services.pybpfthrottle = {
            description = "Bandwidth limits by rules";
            wantedBy = [ "multi-user.target" ];
            serviceConfig = {
              Type = "notify";
              ExecStart = "${lib.getExe' program "pybpfthrottle"} daemon";
              ExecReload = "${lib.getExe' pkgs.coreutils "kill"} -HUP $MAINPID";
            };
          };
        };
    };
}
