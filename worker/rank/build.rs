fn main() {
    fleet_libtorch::Libtorch::find().link();
}
