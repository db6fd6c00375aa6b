fn main() {
    let libtorch = fleet_libtorch::Libtorch::find();
    libtorch.link();
    libtorch.show_to_cargo();
}
