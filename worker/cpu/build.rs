fn main() {
    let libtorch = fleet_libtorch::Libtorch::find();
    libtorch.compile_shim("fleet_shim");
    libtorch.link();
}
